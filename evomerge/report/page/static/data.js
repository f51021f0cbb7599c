"use strict";

// What the page knows of a run. The parts come from inside the document (a report) or from the server (live); both are
// what evomerge/report/page/ writes, and arrays are packed as its arrays.py says.
const Data = (() => {
  const KINDS = { f8: Float64Array, f4: Float32Array, i4: Int32Array, i2: Int16Array, u1: Uint8Array };

  function bytesOf(text) {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return bytes;
  }

  function unpack(packed) {
    const bytes = bytesOf(packed.data);
    if (packed.kind === "bits") {
      return Float32Array.from({ length: packed.size }, (_, i) => (bytes[i >> 3] >> (7 - (i & 7))) & 1);
    }
    return new KINDS[packed.kind](bytes.buffer);
  }

  // A matrix that was packed by columns: a function of row and column.
  function unpackColumns(packed, numRows) {
    const steps = new Uint16Array(bytesOf(packed.data).buffer);
    return (row, column) => packed.low[column] + (steps[column * numRows + row] / 65535) * packed.span[column];
  }

  function coded(given) {
    const codes = unpack(given.codes);
    return (trial) => given.texts[codes[trial]];
  }

  // Scores of subjects on a split: subject -> {values, errors} by objective.
  function scoresOf(given, numObjectives) {
    const values = unpack(given.values);
    const errors = unpack(given.errors);
    const at = (i) => [i * numObjectives, (i + 1) * numObjectives];
    return new Map(
      given.subjects.map((subject, i) => [
        subject,
        { values: values.subarray(...at(i)), errors: errors.subarray(...at(i)) },
      ]),
    );
  }

  class Run {
    constructor(overview) {
      Object.assign(this, overview);
      const trials = overview.trials;
      this.count = trials.count;
      for (const name of ["stage", "index", "known", "order", "cost", "seconds", "operator"]) {
        this[`${name}Of`] = unpack(trials[name]);
      }
      this.stateCodes = unpack(trials.state);
      this.values = trials.values.map(unpack);
      this.errors = trials.errors.map(unpack);
      this.workerOf = coded(trials.worker);
      this.failureOf = coded(trials.failure);
      this.stoppedOf = coded(trials.stopped);
      this.steering = this.objectives.map((_, m) => m).filter((m) => this.objectives[m].steers);
      this.referenceScores = scoresOf(overview.search, this.objectives.length);
      this.testScores = scoresOf(overview.test, this.objectives.length);
      this.isTested = this.testScores.size > 0;
      this.curve = overview.hypervolume && {
        cost: unpack(overview.hypervolume.cost),
        volume: unpack(overview.hypervolume.volume),
      };
      this.places = this.numbers.of.map((layout) => {
        const numbered = unpack(layout.trials);
        return {
          dimensions: unpack(layout.dimensions),
          rows: new Map(Array.from(numbered, (trial, row) => [trial, row])),
          number: unpackColumns(layout.numbers, numbered.length),
        };
      });
    }

    stateOf(trial) {
      return this.states[this.stateCodes[trial]];
    }

    inState(...states) {
      const codes = new Set(states.map((state) => this.states.indexOf(state)));
      const found = [];
      for (let trial = 0; trial < this.count; trial++) if (codes.has(this.stateCodes[trial])) found.push(trial);
      return found;
    }

    label(trial) {
      return this.operators.length > 1
        ? `trial ${trial} by ${this.operators[this.operatorOf[trial]]}`
        : `trial ${trial}`;
    }

    // Value and standard error of a subject in objective m, in the user's sign; null if it is not scored.
    score(subject, m, split) {
      const held = split === "test" ? this.testScores.get(subject) : this.referenceScores.get(subject);
      if (held) return { value: held.values[m], error: held.errors[m] };
      const trial = Data.trialOf(subject);
      if (split === "test" || trial === null || trial >= this.count || Number.isNaN(this.values[m][trial])) return null;
      return { value: this.values[m][trial], error: this.errors[m][trial] };
    }

    // What was searched or kept for a trial: a list of {parameter, expert, group, number}.
    numbersOf(trial) {
      for (const { dimensions, rows, number } of this.places) {
        if (!rows.has(trial)) continue;
        return Array.from(dimensions, (place, column) => {
          const [parameter, expert, group] = this.numbers.names[place];
          return { parameter, expert, group, number: number(rows.get(trial), column) };
        });
      }
      return [];
    }

    // The front's search values, larger is better: what picking goes by.
    frontValues() {
      return this.front.map((trial) => this.steering.map((m) => this.objectives[m].sign * this.values[m][trial]));
    }
  }

  function trialOf(subject) {
    return subject && subject.startsWith("trial:") ? Number(subject.slice(6)) : null;
  }

  const inlined = (name) => document.getElementById(`part-${name}`);

  // Where parts come from. ``tag`` is what the server says of the state that was last read.
  const source = {
    isReport: inlined("overview") !== null,
    tag: null,
    parts: new Map(),

    // The part, or null if it is what it was. Throws an Error with the server's words.
    async overview() {
      if (this.isReport) return JSON.parse(inlined("overview").textContent);
      const headers = this.tag ? { "If-None-Match": this.tag } : {};
      const answer = await fetch("overview", { headers, cache: "no-store" });
      if (answer.status === 304) return null;
      if (!answer.ok) throw new Error(await answer.text());
      this.tag = answer.headers.get("ETag");
      this.parts.clear();
      return answer.json();
    },

    // A promise of another part, as of the overview that was last read.
    part(name) {
      if (!this.parts.has(name)) {
        const read = this.isReport
          ? Promise.resolve().then(() => JSON.parse(inlined(name).textContent))
          : fetch(name, { cache: "no-store" }).then(async (answer) => {
              if (!answer.ok) throw new Error(await answer.text());
              return answer.json();
            });
        this.parts.set(name, read);
      }
      return this.parts.get(name);
    },
  };

  return { Run, source, trialOf, unpack, unpackColumns };
})();
