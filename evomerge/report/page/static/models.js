"use strict";

// What models are called, and their scores in words and as ranges.
const Models = (() => {
  const { number } = Dom;

  function referenceLabel(subject) {
    const [kind, name] = subject.split(":");
    return kind === "expert" ? `expert ${name}` : kind === "scalar" ? `best scalar ${name}` : kind;
  }

  function labelOf(run, subject) {
    const trial = Data.trialOf(subject);
    return trial === null ? referenceLabel(subject) : run.label(trial);
  }

  // How a command names a subject: none of its characters means anything to a shell.
  function wordOf(subject) {
    return String(Data.trialOf(subject) ?? subject);
  }

  // The 95 % intervals of the part "evidence": (split, subject, m) -> [low, high] or null.
  function intervalsOf(part) {
    const bySplit = Object.fromEntries(
      Object.entries(part.intervals).map(([split, { subjects, ends }]) => {
        const rows = new Map(subjects.map((subject, row) => [subject, row]));
        const unpacked = ends.map(Data.unpack);
        return [
          split,
          (subject, m) =>
            rows.has(subject) ? [...unpacked[m].subarray(2 * rows.get(subject), 2 * rows.get(subject) + 2)] : null,
        ];
      }),
    );
    return (split, subject, m) => bySplit[split](subject, m);
  }

  function hoverText(run, subject, split, intervals) {
    const lines = run.objectives.map((objective, m) => {
      const score = run.score(subject, m, split);
      if (!score) return "";
      const ends = intervals && intervals(split, subject, m);
      const interval = ends ? `, 95 % ${number(ends[0])} to ${number(ends[1])}` : "";
      return `<br>${Plots.plain(objective.name)} ${number(score.value)} ±${number(score.error)}${interval}`;
    });
    return `<b>${Plots.plain(labelOf(run, subject))}</b>${lines.join("")}`;
  }

  // The split whose scores of a subject are drawn: the one that is looked at, or the search items where it has no other.
  function splitOf(run, subject, split) {
    return run.score(subject, run.steering[0], split) ? split : "search";
  }

  function rangesOf(run, split, references = run.references, share = 0.05) {
    return run.objectives.map((_, m) => {
      const shown = Array.from(run.values[m]);
      for (const subject of [...references, ...run.front.map((trial) => `trial:${trial}`)]) {
        const score = run.score(subject, m, split);
        if (score) shown.push(score.value - score.error, score.value + score.error);
      }
      return Plots.rangeOf(shown, share);
    });
  }

  function description({ run, state, chosen }) {
    return (
      `${run.front.length} models on the front of ${run.steering.map((m) => run.objectives[m].name).join(", ")}, scores of ${state.split} items` +
      (chosen === null ? "" : `; picked ${run.label(chosen)}`) +
      "; the same numbers are in the table of models below"
    );
  }

  return { referenceLabel, labelOf, wordOf, intervalsOf, hoverText, splitOf, rangesOf, description };
})();
