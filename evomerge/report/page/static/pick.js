"use strict";

// Picking one model from a front: the same rules as evomerge/front/pick.py, number by number.
// values: rows of the front by objectives, larger is better.
const Pick = (() => {
  function scaled(values) {
    const spans = values[0].map((_, m) => {
      const column = values.map((row) => row[m]);
      return [Math.min(...column), Math.max(...column)];
    });
    return values.map((row) =>
      row.map((value, m) => {
        const [low, high] = spans[m];
        return high > low ? (value - low) / (high - low) : 1;
      }),
    );
  }

  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

  function firstOf(numbers, isBetter) {
    let best = 0;
    for (let i = 1; i < numbers.length; i++) if (isBetter(numbers[i], numbers[best])) best = i;
    return best;
  }

  // The row farthest above the plane through the front's extremes.
  function knee(values) {
    return firstOf(scaled(values).map(sum), (a, b) => a > b);
  }

  // The row that serves a preference best: augmented Tchebycheff. weights: zero or more, one of them more.
  function prefer(values, weights) {
    const total = sum(weights);
    const losses = scaled(values).map((row) => {
      const shortfall = row.map((value, m) => (weights[m] / total) * (1 - value));
      return Math.max(...shortfall) + 0.05 * sum(shortfall);
    });
    return firstOf(losses, (a, b) => a < b);
  }

  // The rows that keep every bound; least and most: null or a number an objective, in the user's sign as are rows.
  function within(rows, least, most) {
    const keeps = (value, m) => (least[m] === null || value >= least[m]) && (most[m] === null || value <= most[m]);
    return rows.map((row, i) => (row.every(keeps) ? i : -1)).filter((i) => i >= 0);
  }

  return { knee, prefer, within };
})();
