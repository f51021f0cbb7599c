"use strict";

// The table of trials: filters, sorting by any column, and only those rows in the document that are seen.
const Trials = (() => {
  const { el, fill, refill, number, seconds, select } = Dom;
  const ROW = 26; // pixels, as in page.css
  const SPARE = 12; // rows above and below those that are seen
  let table = null;

  function columnsOf(run) {
    return [
      { name: "trial", value: (trial) => trial, text: (trial) => String(trial) },
      ...run.objectives.map((objective, m) => ({
        name: objective.name,
        value: (trial) => objective.sign * run.values[m][trial],
        first: -1,
        text: (trial) => number(run.values[m][trial]),
        small: (trial) => (Number.isNaN(run.errors[m][trial]) ? "" : ` ±${number(run.errors[m][trial])}`),
      })),
      {
        name: "state",
        value: (trial) => run.stateCodes[trial],
        text: (trial) => run.stateOf(trial),
        first: -1,
        isText: true,
      },
      ...(run.operators.length > 1 ? [operatorOf(run)] : []),
      { name: "stage", value: (trial) => run.stageOf[trial], text: (trial) => String(run.stageOf[trial] + 1) },
      {
        name: "result",
        value: (trial) => (run.orderOf[trial] < 0 ? NaN : run.orderOf[trial]),
        text: (trial) => (run.orderOf[trial] < 0 ? "–" : String(run.orderOf[trial] + 1)),
      },
      { name: "cost", value: (trial) => run.costOf[trial], text: (trial) => number(run.costOf[trial], 2) },
      { name: "time", value: (trial) => run.secondsOf[trial], text: (trial) => seconds(run.secondsOf[trial]) },
      ...(run.trials.worker.texts.some(Boolean)
        ? [
            {
              name: "worker",
              value: (trial) => run.workerOf(trial),
              text: (trial) => run.workerOf(trial),
              isText: true,
            },
          ]
        : []),
    ];
  }

  function operatorOf(run) {
    const text = (trial) => run.operators[run.operatorOf[trial]];
    return { name: "operator", value: text, text, isText: true };
  }

  // The trials that pass the filters, sorted; what has no number comes last.
  function sorted(run, state, columns) {
    let found = state.filter === "all" ? Array.from({ length: run.count }, (_, i) => i) : run.inState(state.filter);
    if (state.stage !== null) found = found.filter((trial) => run.stageOf[trial] === state.stage);
    const { value } = columns.find((column) => column.name === state.sort) ?? columns[0];
    const keys = new Map(found.map((trial) => [trial, value(trial)]));
    const isMissing = (key) => typeof key === "number" && Number.isNaN(key);
    return found.sort((a, b) => {
      const [one, other] = [keys.get(a), keys.get(b)];
      if (isMissing(one) || isMissing(other)) return isMissing(one) - isMissing(other) || a - b;
      return (one < other ? -1 : one > other ? 1 : 0) * state.direction || a - b;
    });
  }

  function make(place) {
    table = {
      filters: el("div", { class: "tools" }),
      note: el("span", { class: "note" }),
      head: el("tr"),
      before: el("tr", { "aria-hidden": "true" }),
      after: el("tr", { "aria-hidden": "true" }),
      body: el("tbody"),
      view: null,
      rows: [],
      columns: [],
      chosen: null,
      versus: null,
      picked: null,
      choose: null,
    };
    table.view = el(
      "div",
      {
        class: "scroll trials",
        tabindex: "0",
        role: "region",
        "aria-label": "trials; arrow keys move through the rows, Enter picks one",
        onscroll: () => requestAnimationFrame(drawRows),
        onkeydown: onKey,
      },
      el("table", {}, el("thead", {}, table.head), table.body),
    );
    fill(place, el("div", { class: "tools" }, table.filters, table.note), table.view);
  }

  // Arrow keys pick the row above or below what is picked by now: keys may come faster than rows are drawn.
  function onKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15 }[event.key];
    if (!step || !table.rows.length) return;
    event.preventDefault();
    const at = table.rows.indexOf(table.picked());
    const next = Math.max(0, Math.min(table.rows.length - 1, at < 0 ? 0 : at + step));
    const top = next * ROW;
    if (top < table.view.scrollTop || top > table.view.scrollTop + table.view.clientHeight - 3 * ROW)
      table.view.scrollTop = top - table.view.clientHeight / 2;
    table.choose(`trial:${table.rows[next]}`);
  }

  function drawRows() {
    const { rows, columns, view } = table;
    const from = Math.max(0, Math.floor(view.scrollTop / ROW) - SPARE);
    const to = Math.min(rows.length, from + Math.ceil((view.clientHeight || 600) / ROW) + 2 * SPARE);
    const filler = (made, height) => {
      fill(made, el("td", { colspan: String(columns.length) }));
      made.firstChild.style.height = `${height}px`;
      return height ? made : null;
    };
    fill(
      table.body,
      filler(table.before, from * ROW),
      rows.slice(from, to).map((trial) =>
        el(
          "tr",
          {
            class: `row state-${table.stateOf(trial).replaceAll(" ", "-")}${trial === table.chosen ? " is-chosen" : ""}${trial === table.versus ? " is-versus" : ""}`,
            "data-trial": String(trial),
            "aria-current": trial === table.chosen ? "true" : null,
            onclick: () => table.choose(`trial:${trial}`),
          },
          columns.map((column) =>
            el(
              "td",
              { class: column.isText ? "text" : null },
              column.text(trial),
              column.small ? el("small", {}, column.small(trial)) : null,
            ),
          ),
        ),
      ),
      filler(table.after, (rows.length - to) * ROW),
    );
  }

  function render(place, view) {
    const { run, state, change, chosen, picked, choose } = view;
    if (!table || !place.contains(table.view)) make(place);
    const columns = columnsOf(run);
    Object.assign(table, {
      columns,
      rows: sorted(run, state, columns),
      chosen,
      versus: Data.trialOf(state.versus),
      picked,
      choose,
      stateOf: (trial) => run.stateOf(trial),
    });
    const counts = run.states.map((name) => [name, run.inState(name).length]).filter(([, number_]) => number_);
    refill(
      table.filters,
      select(
        "Show",
        [["all", `all ${run.count}`], ...counts.map(([name, number_]) => [name, `${name} (${number_})`])],
        state.filter,
        (filter) => change({ filter }),
      ),
      run.stages.length > 1
        ? select(
            "Stage",
            [["", "all"], ...run.stages.map((name, i) => [String(i), `${i + 1}: ${name}`])],
            state.stage === null ? "" : String(state.stage),
            (stage) => change({ stage: stage === "" ? null : Number(stage) }),
          )
        : null,
    );
    table.note.textContent = `${table.rows.length.toLocaleString("en")} of ${run.count.toLocaleString("en")} trials, search scores`;
    fill(
      table.head,
      columns.map((column) => {
        const isSorted = column.name === state.sort;
        const next = isSorted ? -state.direction : (column.first ?? 1);
        return el(
          "th",
          {
            scope: "col",
            class: column.isText ? "text" : null,
            "aria-sort": isSorted ? (state.direction > 0 ? "ascending" : "descending") : null,
          },
          el(
            "button",
            {
              type: "button",
              class: "link",
              "data-key": `sort ${column.name}`,
              onclick: () => change({ sort: column.name, direction: next }),
            },
            column.name,
            el("span", { "aria-hidden": "true" }, isSorted ? (state.direction > 0 ? " ↑" : " ↓") : ""),
          ),
        );
      }),
    );
    drawRows();
  }

  return { render };
})();
