"use strict";

// Two models on the same items: paired, and clustered by source, as evomerge/evidence/ does it.
const Compare = (() => {
  const PSEUDO_ITEMS = 0.25;

  function sumsBySource(numbers, codes) {
    const sums = new Float64Array(codes.reduce((most, code) => Math.max(most, code), -1) + 1);
    for (let i = 0; i < numbers.length; i++) sums[codes[i]] += numbers[i];
    return sums;
  }

  function squares(sums) {
    const total = sums.reduce((kept, sum) => kept + sum * sum, 0);
    return sums.length < 2 ? Infinity : (sums.length / (sums.length - 1)) * total;
  }

  // ours - theirs in the user's sign: mean, standard error and 95 % interval. frame: codes of the items' sources, and
  // the standard errors that an interval takes to each side (null for a single source).
  function paired(ours, theirs, frame) {
    const num = ours.length;
    const gains = Float64Array.from(ours, (value, i) => value - theirs[i]);
    const total = gains.reduce((kept, gain) => kept + gain, 0);
    const value = total / num;
    const error = Math.sqrt(
      squares(
        sumsBySource(
          gains.map((gain) => (gain - value) / num),
          frame.codes,
        ),
      ),
    );
    const isWonOrLost = gains.every((gain) => gain === 0 || gain === 1 || gain === -1);
    const pseudo = isWonOrLost ? PSEUDO_ITEMS : 0;
    const size = num + 2 * pseudo;
    const middle = total / size;
    const sums = sumsBySource(
      gains.map((gain) => (gain - middle) / size),
      frame.codes,
    );
    const ofPseudo = (pseudo * ((1 - middle) ** 2 + (1 + middle) ** 2)) / size ** 2;
    const half = frame.factor === null ? Infinity : frame.factor * Math.sqrt(squares(sums) + ofPseudo);
    return { value, error, low: middle - half, high: middle + half };
  }

  // Which items turned right and which turned wrong, where items are right (1) or wrong (0); else null.
  function changed(ours, theirs) {
    const isRightOrWrong = (value) => value === 0 || value === 1;
    if (!ours.every(isRightOrWrong) || !theirs.every(isRightOrWrong)) return null;
    const all = Array.from(ours.keys());
    return { won: all.filter((i) => ours[i] > theirs[i]), lost: all.filter((i) => ours[i] < theirs[i]) };
  }

  // The items' scores of models, split by split, as parts bring them: "items" those of many, "items/N" of one trial.
  function table() {
    const frames = {};
    const packed = { search: new Map(), test: new Map() };
    const unpacked = { search: new Map(), test: new Map() };
    return {
      frames, // split -> objective by objective what is the same for all models; empty until "items" is here

      take(part) {
        for (const [split, given] of Object.entries(part.frames ?? {}))
          frames[split] = given.map((frame) => ({ ...frame, codes: Data.unpack(frame.codes) }));
        for (const [split, held] of Object.entries(part.held))
          for (const [subject, arrays] of Object.entries(held)) packed[split].set(subject, arrays);
      },

      // Objective by objective the items' scores of a subject; null if they are not here.
      items(subject, split) {
        if (!packed[split].has(subject)) return null;
        if (!unpacked[split].has(subject)) unpacked[split].set(subject, packed[split].get(subject).map(Data.unpack));
        return unpacked[split].get(subject);
      },

      // The split on which two subjects can be compared: the test items if both are here on them; null if there is none.
      sharedSplit(ours, theirs) {
        const isHere = (split) => packed[split].has(ours) && packed[split].has(theirs);
        return ["test", "search"].find(isHere) ?? null;
      },
    };
  }

  return { paired, changed, table };
})();
