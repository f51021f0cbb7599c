"use strict";

// The view of one model: its numbers, what it gains and loses, which items changed, and where it comes from.
const Model = (() => {
  const { el, fill, refill, number, signed, count, seconds, choice, select, card, empty, command } = Dom;
  const MAX_ITEMS = 60; // of changed ones that are listed
  let places = null;

  function make(place) {
    places = {
      facts: el("div"),
      versus: el("div"),
      other: otherTrial(),
      chooser: el("div", { class: "tools" }),
      itemNote: el("p", { class: "note" }),
      tools: el("div", { class: "tools" }),
      maps: el("div"),
      gains: el("div"),
      items: el("div"),
    };
    fill(
      place,
      card(null, places.facts, el("div", { class: "tools" }, places.versus, places.other.label)),
      card("Numbers that were searched", places.tools, places.maps),
      card("Gains and losses", places.gains),
      card("Items that changed", places.chooser, places.itemNote, places.items),
    );
  }

  function facts(view) {
    const { run, chosen } = view;
    const order = run.orderOf[chosen];
    const rows = [
      ["State", run.stateOf(chosen)],
      [
        "Stage",
        `${run.stageOf[chosen] + 1}: ${run.stages[run.stageOf[chosen]] ?? ""}, its trial ${run.indexOf[chosen] + 1}`,
      ],
      ["Asked", `when ${count(run.knownOf[chosen], "result")} ${run.knownOf[chosen] === 1 ? "was" : "were"} known`],
      ["Finished", order < 0 ? "not yet" : `as result ${order + 1} of the run`],
      ["Operator", run.operators[run.operatorOf[chosen]]],
      [
        "Cost",
        Number.isNaN(run.costOf[chosen])
          ? "–"
          : `${number(run.costOf[chosen], 2)} full-evaluation equivalents, ${seconds(run.secondsOf[chosen])} of a worker`,
      ],
      ["Worker", run.workerOf(chosen)],
      ["Descent", run.trials.descents[chosen]],
      ["Stopped", run.stoppedOf(chosen)],
      ["Failed", run.failureOf(chosen)],
    ].filter(([, text]) => text);
    const bounds = run.objectives
      .filter((objective) => objective.floor !== null || objective.ceiling !== null)
      .map(
        (objective) =>
          `${objective.name}${objective.floor === null ? "" : ` ≥ ${objective.floor}`}${objective.ceiling === null ? "" : ` ≤ ${objective.ceiling}`}`,
      );
    if (bounds.length) rows.push(["Bounds", bounds.join(", ")]);
    if (run.lineage.length) rows.push(["Lineage", run.lineage.join("; ")]);
    const title = run.label(chosen);
    return [
      el("h2", {}, title[0].toUpperCase() + title.slice(1)),
      el(
        "dl",
        { class: "pairs" },
        rows.map(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]),
      ),
    ];
  }

  async function drawNumbers({ run, state, change, chosen }) {
    const other = Data.trialOf(state.versus);
    const isDifference = state.numbers === "difference" && other !== null;
    const cells = run.numbersOf(chosen);
    const theirs = new Map(
      other === null
        ? []
        : run.numbersOf(other).map((cell) => [JSON.stringify([cell.parameter, cell.expert, cell.group]), cell.number]),
    );
    const shown = cells
      .map((cell) => ({
        ...cell,
        row: cell.expert || (cell.group ? "all experts" : cell.parameter),
        column: cell.group || "all groups",
        number: isDifference
          ? cell.number - (theirs.get(JSON.stringify([cell.parameter, cell.expert, cell.group])) ?? NaN)
          : cell.number,
      }))
      .filter((cell) => !Number.isNaN(cell.number));
    fill(
      places.tools,
      other === null
        ? null
        : choice(
            "Show",
            [
              ["numbers", "its numbers"],
              ["difference", `less those of ${run.label(other)}`],
            ],
            state.numbers,
            (numbers) => change({ numbers }),
          ),
      el("span", { class: "note" }, "experts down, groups across; the exact recipe is written by the export"),
    );
    const parameters = [...new Set(shown.map((cell) => cell.parameter))];
    if (!shown.length) {
      const why = cells.length ? "The two share no number." : "Nothing but the operator was searched.";
      return fill(places.maps, empty(why));
    }
    if (places.maps.dataset.parameters !== parameters.join()) {
      places.maps.dataset.parameters = parameters.join();
      fill(
        places.maps,
        parameters.map((parameter) => [el("h3", {}, parameter), el("div", { class: "plot" })]),
      );
    }
    const plots = [...places.maps.querySelectorAll(".plot")];
    for (const [i, parameter] of parameters.entries()) {
      const own = shown.filter((cell) => cell.parameter === parameter);
      await Plots.heatMap(
        plots[i],
        `${parameter} of ${run.label(chosen)} by expert and group, from ${number(Math.min(...own.map((cell) => cell.number)))} to ${number(Math.max(...own.map((cell) => cell.number)))}`,
        own,
      );
    }
  }

  // A difference with its interval as a bar about 0; better or worse where the interval leaves 0 out.
  function differenceCell(found, sign, limit) {
    const isBeyond = found.low > 0 || found.high < 0;
    const kind = !isBeyond ? "open" : sign * found.value > 0 ? "better" : "worse";
    const at = (value) => `${(50 + (50 * Math.max(-limit, Math.min(limit, value))) / limit).toFixed(2)}%`;
    const bar = el(
      "span",
      { class: "whisker", "aria-hidden": "true" },
      el("i", { class: "zero" }),
      el("i", { class: "span" }),
      el("i", { class: "dot" }),
    );
    const [, span, dot] = bar.children;
    span.style.left = at(found.low);
    span.style.right = `calc(100% - ${at(found.high)})`;
    dot.style.left = at(found.value);
    const word = { better: "▲ ", worse: "▼ ", open: "" }[kind];
    return el(
      "td",
      { class: `difference ${kind}`, title: `95 % interval ${signed(found.low)} to ${signed(found.high)}` },
      el("span", {}, `${word}${signed(found.value)}`, el("small", {}, ` ±${number(found.error)}`)),
      bar,
      el("span", { class: "sr" }, `, 95 % ${signed(found.low)} to ${signed(found.high)}`),
    );
  }

  function gainsTable({ run, state, change, chosen, table }) {
    const own = `trial:${chosen}`;
    const subjects = [...new Set([state.versus, ...run.references].filter(Boolean))];
    const rivals = subjects.filter((subject) => table.sharedSplit(own, subject));
    const absent = subjects.filter((subject) => !rivals.includes(subject));
    if (!rivals.length) return absent.length ? whyNot(run, own, absent[0]) : empty("Nothing is scored yet.");
    const splits = rivals.map((subject) => table.sharedSplit(own, subject));
    const rows = rivals.map((subject, i) => {
      const [ours, theirs] = [own, subject].map((of) => table.items(of, splits[i]));
      return run.objectives.map((_, m) => Compare.paired(ours[m], theirs[m], table.frames[splits[i]][m]));
    });
    const limits = run.objectives.map((_, m) =>
      Math.max(
        1e-9,
        ...rows.map((row) =>
          Math.max(...[row[m].low, row[m].high].filter(Number.isFinite).map(Math.abs), Math.abs(row[m].value)),
        ),
      ),
    );
    const heads = run.objectives.map((objective) =>
      el("th", { scope: "col" }, objective.name, objective.sign < 0 ? el("small", {}, " lower is better") : null),
    );
    const body = rows.map((row, i) =>
      el(
        "tr",
        { class: rivals[i] === state.versus ? "is-versus" : "" },
        el(
          "th",
          { scope: "row" },
          el(
            "button",
            { type: "button", class: "link", onclick: () => change({ versus: rivals[i] }) },
            `over ${Models.labelOf(run, rivals[i])}`,
          ),
          el("small", {}, ` ${splits[i]} items`),
        ),
        row.map((found, m) => differenceCell(found, run.objectives[m].sign, limits[m])),
      ),
    );
    const isSteered = splits.includes("search")
      ? " Search items are those that models are picked by: on them a picked one looks better than it is."
      : "";
    return [
      absent.includes(state.versus) ? whyNot(run, own, state.versus) : null,
      el(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "gains and losses" },
        el("table", { class: "gains" }, el("thead", {}, el("tr", {}, el("th", {}, ""), heads)), el("tbody", {}, body)),
      ),
      el(
        "p",
        { class: "note" },
        `Paired item by item and clustered by source, in the objectives' own sign.${isSteered} ▲ better, ▼ worse: the 95 % interval of that one pair leaves 0 out; among many pairs some do by chance.`,
      ),
    ];
  }

  // Why two models are not compared here item by item.
  function whyNot(run, ours, theirs) {
    for (const subject of [ours, theirs]) {
      const trial = Data.trialOf(subject);
      if (trial === null) continue;
      if (!run.score(subject, 0, "search")) return empty(`Trial ${trial} has no scores.`);
      if (run.stateOf(trial) === "stopped")
        return empty(`Trial ${trial} was stopped early: it is not scored on the same items as others.`);
    }
    if (!Data.source.isReport) return empty("Reading the items…");
    return [
      empty("This file has no room for the items of all trials; in a terminal they are compared by"),
      command(`evomerge compare ${run.command} ${Models.wordOf(ours)} ${Models.wordOf(theirs)}`),
    ];
  }

  function itemRows(frame, places_, word) {
    const shown = places_
      .slice(0, MAX_ITEMS)
      .map((i) =>
        el(
          "li",
          {},
          el("code", {}, `item ${i}`),
          ` of source ${frame.sources[i]}`,
          frame.texts ? el("q", {}, frame.texts[i]) : null,
        ),
      );
    const rest = places_.length - shown.length;
    return el(
      "div",
      {},
      el("h3", {}, `${word} `, el("small", {}, count(places_.length, "item"))),
      el("ul", { class: "items" }, shown),
      rest > 0 ? el("p", { class: "note" }, `and ${rest} more`) : null,
    );
  }

  function showItems({ run, state, change, chosen, table }) {
    const own = `trial:${chosen}`;
    const split = state.versus && table.sharedSplit(own, state.versus);
    const [ours, theirs] = split ? [own, state.versus].map((subject) => table.items(subject, split)) : [];
    const choices = run.objectives
      .map((_, m) => m)
      .filter((m) => split && !run.objectives[m].measure.includes(" of ") && Compare.changed(ours[m], theirs[m]));
    if (!choices.length) {
      fill(places.chooser);
      places.itemNote.textContent = "";
      if (!state.versus) return fill(places.items, empty("Choose a model to compare with."));
      return fill(
        places.items,
        split ? empty("No objective has items that are right or wrong.") : whyNot(run, own, state.versus),
      );
    }
    const m = choices.includes(state.item) ? state.item : choices[0];
    refill(
      places.chooser,
      select(
        "Objective",
        choices.map((at) => [String(at), run.objectives[at].name]),
        String(m),
        (at) => change({ item: Number(at) }),
      ),
    );
    const pair = `${run.label(chosen)} against ${Models.labelOf(run, state.versus)}`;
    places.itemNote.textContent = `${pair}, ${split} items by their place in the split`;
    const found = Compare.changed(ours[m], theirs[m]);
    const frame = table.frames[split][m];
    return fill(
      places.items,
      el(
        "div",
        { class: "two" },
        itemRows(frame, found.won, "Wrong to right"),
        itemRows(frame, found.lost, "Right to wrong"),
      ),
    );
  }

  // The models to compare with: references first, then the front, and what is compared already.
  function versusSelect({ run, state, change, chosen }) {
    const subjects = new Set([...run.references, ...run.front.map((trial) => `trial:${trial}`)]);
    if (state.versus) subjects.add(state.versus);
    subjects.delete(`trial:${chosen}`);
    return select(
      "Compare with",
      [["", "nothing"], ...Array.from(subjects, (subject) => [subject, Models.labelOf(run, subject)])],
      state.versus ?? "",
      (versus) => change({ versus: versus || null }),
    );
  }

  // A field for the number of any other trial to compare with; it stays while a person types.
  function otherTrial() {
    const field = el("input", {
      type: "number",
      min: "0",
      oninput: () => field.setCustomValidity(""),
      onchange: () => {
        if (field.value === "") return;
        const { run, chosen, change } = made.view;
        const versus = `trial:${field.value}`;
        const isOther = Number(field.value) !== chosen;
        if (isOther && run.score(versus, 0, "search")) return void change({ versus });
        field.setCustomValidity(isOther ? `There is no scored trial ${field.value}.` : "This one is picked already.");
        field.reportValidity();
      },
    });
    const label = el("label", { class: "other" }, el("span", { class: "legend" }, "or any trial, by number"), field);
    const made = {
      label,
      view: null,
      update(view) {
        made.view = view;
        if (document.activeElement !== field) field.value = Data.trialOf(view.state.versus) ?? "";
      },
    };
    return made;
  }

  async function render(place, view) {
    if (view.chosen === null) {
      places = null;
      return fill(place, empty("No model is picked."));
    }
    if (!places || !place.contains(places.facts)) make(place);
    fill(places.facts, facts(view));
    refill(places.versus, versusSelect(view));
    places.other.update(view);
    await drawNumbers(view);
    if (!view.table.frames.search) return fill(places.gains, empty("Reading the items…"));
    fill(places.gains, gainsTable(view));
    return showItems(view);
  }

  return { render };
})();
