"use strict";

// The page: what a person has chosen, which view is shown, and looking again while a campaign runs.
const Page = (() => {
  const { el, fill, number, count } = Dom;
  const at = (id) => document.getElementById(id);
  const VIEWS = [
    ["front", "Front"],
    ["model", "Model"],
    ["surrogate", "Surrogate"],
    ["run", "Run"],
  ];
  const RENDER = { front: Front.render, model: Model.render, surrogate: SurrogateView.render, run: RunView.render };
  const LOOK_S = 2; // between looks at a run that is driven; others are looked at less often
  const IDLE_S = 10;
  const ADDRESS_MS = 200; // between two writings of the address
  const REST_S = { evidence: 20, surrogate: 60 };

  let run = null;
  let state = null;
  const known = { table: Compare.table() }; // parts as last read: claims, intervals, items, surrogate
  const asked = new Map(); // part -> the run for which it was asked for, and when
  const panels = {};

  const START = {
    view: "front",
    rule: "knee",
    trial: null,
    versus: null,
    split: null,
    as: null,
    numbers: "numbers",
    item: 0,
    filter: "all",
    stage: null,
    sort: "trial",
    direction: 1,
    every: false,
  };

  // What stands after # in the address: the view and what was picked, so that a link shows the same. Going back in the
  // browser's history goes back to the view before.
  function stateFromAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    const numbers = (name, missing) => {
      const parts = given.has(name) ? given.get(name).split(",") : [];
      return run.objectives.map((_, m) => (parts[m] && Number.isFinite(Number(parts[m])) ? Number(parts[m]) : missing));
    };
    const oneOf = (name, values, other) => (values.includes(given.get(name)) ? given.get(name) : other);
    const trial = given.has("trial") && /^\d+$/.test(given.get("trial")) ? Number(given.get("trial")) : null;
    return {
      view: oneOf(
        "view",
        VIEWS.map(([name]) => name),
        "front",
      ),
      rule: oneOf("rule", ["knee", "prefer", "trial"], "knee"),
      trial,
      versus: run.score(given.get("versus"), 0, "search") ? given.get("versus") : null,
      split: oneOf("split", ["search", "test"], null),
      as: oneOf("as", ["pairs", "parallel"], null),
      weights: numbers("weights", 1),
      least: numbers("least", null),
      most: numbers("most", null),
    };
  }

  function addressOf() {
    const kept = new URLSearchParams({ view: state.view, rule: state.rule });
    if (state.rule === "trial" && state.trial !== null) kept.set("trial", String(state.trial));
    if (state.versus) kept.set("versus", state.versus);
    for (const name of ["split", "as"]) if (state[name]) kept.set(name, state[name]);
    for (const [name, plain] of [
      ["weights", 1],
      ["least", null],
      ["most", null],
    ]) {
      if (state[name].some((value) => value !== plain))
        kept.set(name, state[name].map((value) => value ?? "").join(","));
    }
    return `#${kept}`;
  }

  // Browsers refuse to write an address hundreds of times, as a slider that is dragged would have it.
  let writing = null;
  let written = 0;
  function writeAddress() {
    clearTimeout(writing);
    writing = null;
    written = performance.now();
    history.replaceState(null, "", addressOf());
  }

  function writeAddressSoon() {
    writing ??= setTimeout(writeAddress, Math.max(0, ADDRESS_MS - (performance.now() - written)));
  }

  function readAddress() {
    Object.assign(state, stateFromAddress());
    Picker.make(at("pick"), run, () => state, change);
    schedule();
  }

  // What happens to the page, once: a screen reader reads each change.
  function say(text) {
    if (at("live").textContent !== text) at("live").textContent = text;
  }

  function change(patch) {
    const isNewView = "view" in patch && patch.view !== state.view;
    if (isNewView) writeAddress();
    if (patch.reset)
      Object.assign(state, {
        rule: "knee",
        weights: run.objectives.map(() => 1),
        least: run.objectives.map(() => null),
        most: run.objectives.map(() => null),
      });
    else Object.assign(state, patch);
    if (isNewView) history.pushState(null, "", addressOf());
    else writeAddressSoon();
    if (patch.reset) Picker.make(at("pick"), run, () => state, change);
    schedule();
  }

  // A trial becomes the picked model, a reference the one to compare with.
  function choose(subject) {
    const trial = Data.trialOf(subject);
    change(trial === null ? { versus: subject } : { rule: "trial", trial });
  }

  // Show the state in the next frame: what is picked at once, pictures as fast as they can be drawn.
  let isScheduled = false;
  let isDrawing = false;
  let isStale = false;
  let drawn = Promise.resolve();
  function schedule() {
    if (isScheduled) return;
    isScheduled = true;
    requestAnimationFrame(() => {
      isScheduled = isStale = false;
      const chosen = Picker.pick(run, state);
      Picker.update(run, state, change, chosen);
      if (isDrawing) isStale = true;
      else drawn = draw(chosen);
    });
  }

  async function draw(chosen) {
    isDrawing = true;
    try {
      await render(chosen);
    } catch (error) {
      // a picture that failed must not end the page
      console.error(error);
      say(`This view cannot be shown: ${error.message}`);
    }
    isDrawing = false;
    if (isStale) schedule();
  }

  async function render(chosen) {
    for (const [name] of VIEWS) {
      const isShown = name === state.view;
      panels[name].hidden = !isShown;
      const tab = at(`tab-${name}`);
      tab.setAttribute("aria-selected", String(isShown));
      tab.tabIndex = isShown ? 0 : -1;
    }
    const shown = {
      ...state,
      split: state.split ?? (run.isTested ? "test" : "search"),
      as: state.as ?? (run.steering.length > 3 ? "parallel" : "pairs"),
    };
    if (!run.isTested) shown.split = "search";
    if (state.versus === `trial:${chosen}`) shown.versus = null;
    await RENDER[state.view](panels[state.view], {
      run,
      state: shown,
      chosen,
      picked: () => Picker.pick(run, state),
      change,
      choose,
      theme: document.documentElement.dataset.theme,
      ...known,
    });
    const items = ["items", ...[`trial:${chosen}`, shown.versus].map(itemsPart).filter(Boolean)];
    need({ front: ["evidence"], model: items, surrogate: ["surrogate"], run: ["log"] }[state.view]);
  }

  // The part that brings a trial's items; null if they are here, or nobody has them. A report holds all that it will.
  function itemsPart(subject) {
    const trial = Data.trialOf(subject);
    if (Data.source.isReport || trial === null || !run.score(subject, 0, "search")) return null;
    const splits = run.testScores.has(subject) ? ["search", "test"] : ["search"];
    const isHere = run.stateOf(trial) === "stopped" || splits.every((split) => known.table.items(subject, split));
    return isHere ? null : `items/${trial}`;
  }

  // Read the parts that a view needs, and show it again once they are here. What takes the server long is not asked for
  // each time that a run has grown.
  function need(names) {
    for (const name of names) {
      const last = asked.get(name);
      const isRecent = performance.now() - last?.time < 1000 * (REST_S[name] ?? 0);
      const rests = run.state === "running" && isRecent && !known[name]?.absent;
      if (last && (last.run === run || rests)) continue;
      asked.set(name, { run, time: performance.now() });
      Data.source
        .part(name)
        .then((part) => {
          if (name === "evidence")
            Object.assign(known, {
              claims: part.claims,
              intervals: Models.intervalsOf(part),
              volume: part.hypervolume && Data.unpack(part.hypervolume),
            });
          else if (name.startsWith("items")) known.table.take(part);
          else known[name] = part;
          schedule();
        })
        .catch((error) => {
          asked.delete(name); // it is asked for again with the next look at the view
          Data.source.parts.delete(name);
          say(`${name}: ${error.message}`);
        });
    }
  }

  function showHeader() {
    document.title = `${run.name}: evomerge`;
    at("name").textContent = run.name;
    Object.assign(at("state"), {
      hidden: false,
      textContent: run.state,
      className: `state is-${run.state}`,
      title: run.holder ?? "",
    });
    const finished = run.count - run.inState("waiting").length;
    const facts = [
      ["merged", `${count(run.experts.length, "expert")} by ${run.operators.join(" or ")}`],
      ["searched", `${run.dimensions} dimensions`],
      ["trials", `${finished.toLocaleString("en")} of ${run.budget.toLocaleString("en")}`],
      ["front", count(run.front.length, "model")],
      ["cost", `${Math.round(run.cost).toLocaleString("en")} full evaluations`],
      ...["failed", "stopped"]
        .map((name) => [name, run.inState(name).length])
        .filter(([, many]) => many)
        .map(([name, many]) => [name, String(many)]),
      ["written", new Date(1000 * run.written).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })],
    ];
    fill(
      at("facts"),
      facts.map(([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, text))),
    );
  }

  function makeTabs() {
    const tabs = at("tabs");
    fill(
      tabs,
      VIEWS.map(([name, title]) =>
        el(
          "button",
          {
            type: "button",
            role: "tab",
            id: `tab-${name}`,
            "aria-controls": `view-${name}`,
            onclick: () => change({ view: name }),
          },
          title,
        ),
      ),
    );
    tabs.hidden = false;
    tabs.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const names = VIEWS.map(([name]) => name);
      const next = names[(names.indexOf(state.view) + step + names.length) % names.length];
      change({ view: next });
      at(`tab-${next}`).focus();
    });
    for (const [name] of VIEWS)
      panels[name] = el("div", {
        role: "tabpanel",
        id: `view-${name}`,
        "aria-labelledby": `tab-${name}`,
        hidden: true,
      });
    fill(at("main"), Object.values(panels));
  }

  // Take a newer overview; what a person has chosen stays.
  function take(overview) {
    const isFirst = run === null;
    run = new Data.Run(overview);
    if (isFirst) {
      state = { ...START };
      makeTabs();
      at("pick").hidden = false;
      readAddress();
      addEventListener("popstate", readAddress);
    }
    showHeader();
    schedule();
  }

  async function look() {
    let wait = IDLE_S;
    if (!document.hidden) {
      const begun = performance.now();
      try {
        const overview = await Data.source.overview();
        if (overview) take(overview);
        say(run.state === "running" ? "live" : "");
      } catch (error) {
        say(`No news: ${error.message}. Shown is what was last read.`);
      }
      if (run?.state === "running") wait = Math.max(LOOK_S, (10 * (performance.now() - begun)) / 1000); // a large run is not asked for all the time
    }
    setTimeout(look, 1000 * wait);
  }

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    at("theme").textContent = theme === "dark" ? "Light" : "Dark";
    at("theme").setAttribute("aria-label", `switch to the ${theme === "dark" ? "light" : "dark"} theme`);
    if (run) schedule();
  }

  function startTheme() {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    setTheme(dark.matches ? "dark" : "light");
    dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
    at("theme").addEventListener("click", () =>
      setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"),
    );
  }

  async function listRuns() {
    await Runs.show(at("main")).catch((error) => say(error.message));
    setTimeout(listRuns, 1000 * IDLE_S);
  }

  async function begin() {
    performance.mark("begin");
    startTheme();
    document.querySelector(".skip").addEventListener("click", (event) => {
      event.preventDefault(); // what stands after # in the address is what was chosen
      at("main").focus();
    });
    if (!Data.source.isReport && !location.pathname.startsWith("/run/")) {
      at("page").classList.add("alone");
      return listRuns();
    }
    if (Data.source.isReport) {
      take(await Data.source.overview());
    } else {
      at("home").hidden = false;
      await look();
    }
    await new Promise((resolve) => requestAnimationFrame(resolve));
    await drawn;
    performance.mark("interactive");
    document.documentElement.dataset.ready = "true";
    return undefined;
  }

  begin();
  return {
    get state() {
      return state;
    },
    get run() {
      return run;
    },
  };
})();
