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

  // The part "items", unpacked: objective by objective its frame, and the items' scores of a subject (null if absent).
  function table(part) {
    const frames = part.objectives.map((frame) => ({ ...frame, codes: Data.unpack(frame.codes) }));
    const known = new Map();
    return {
      split: part.split,
      frames,
      subjects: Object.keys(part.subjects),
      items(subject) {
        if (!part.subjects[subject]) return null;
        if (!known.has(subject)) known.set(subject, part.subjects[subject].map(Data.unpack));
        return known.get(subject);
      },
    };
  }

  return { paired, changed, table };
})();
