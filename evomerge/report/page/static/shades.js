"use strict";

// The third objective as a colour: what a panel of two does not show of the front, and the bar that says how to read it.
const Shades = (() => {
  // From low to high in steps that are equal to the eye, a colour-blind one too: viridis (Smith and van der Walt 2015).
  const VIRIDIS = "#440154 #482878 #3e4989 #31688e #26828e #1f9e89 #35b779 #6ece58 #b5de2b #fde725".split(" ");
  const LENGTH = 0.4; // of the bar, as a share of its panel

  // The scale without the end that is hardly seen on the theme's ground.
  function stops(theme) {
    const seen = theme === "dark" ? VIRIDIS.slice(1) : VIRIDIS.slice(0, -1);
    return seen.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  }

  // The colour at a share of the scale, between its two nearest stops.
  function colourAt(scale, share) {
    const place = share * (scale.length - 1);
    const below = Math.min(Math.floor(place), scale.length - 2);
    const mixed = scale[below].map((part, i) => Math.round(part + (place - below) * (scale[below + 1][i] - part)));
    return `rgb(${mixed.join()})`;
  }

  // The one of three objectives that is not on a panel's axes; null if they are not three.
  function thirdOf(run, pair) {
    return run.steering.length === 3 ? run.steering.find((m) => !pair.includes(m)) : null;
  }

  // What the ends of the scale stand for: the least and the largest number of the front's models.
  function endsOf({ run, state }, m) {
    const scores = run.front.map((trial) => run.score(`trial:${trial}`, m, state.split));
    return Plots.rangeOf(
      scores.filter(Boolean).map((score) => score.value),
      0,
    );
  }

  // Models of the front -> their colours.
  function coloursOf(view, subjects, m) {
    const scale = stops(view.theme);
    const [low, high] = endsOf(view, m);
    return subjects.map((subject) =>
      colourAt(scale, (view.run.score(subject, m, view.state.split).value - low) / (high - low)),
    );
  }

  function gradient(scale) {
    const canvas = document.createElement("canvas");
    canvas.width = 200;
    canvas.height = 1;
    const context = canvas.getContext("2d");
    for (let x = 0; x < canvas.width; x++) {
      context.fillStyle = colourAt(scale, x / (canvas.width - 1));
      context.fillRect(x, 0, 1, 1);
    }
    return canvas.toDataURL("image/png");
  }

  // Add to a layout, above a panel (its domains x and y), what the colours stand for. height: pixels of all panels.
  function addBar(layout, view, m, panel, height) {
    const { text, muted } = Plots.colours();
    const [low, high] = endsOf(view, m);
    const width = panel.x[1] - panel.x[0];
    const [from, to] = [panel.x[0] + 0.16 * width, panel.x[0] + (0.16 + LENGTH) * width];
    const paper = { xref: "paper", yref: "paper", y: panel.y[1], yanchor: "bottom" };
    const size = { x: from, sizex: to - from, y: panel.y[1] + 6 / height, sizey: 7 / height, sizing: "stretch" };
    layout.images.push({ ...paper, ...size, source: gradient(stops(view.theme)) });
    const words = { ...paper, showarrow: false };
    const end = { ...words, yshift: 1, font: { size: 10.5, color: muted } };
    const title = `colour: ${Plots.plain(Plots.titled(view.run.objectives[m]))}`;
    layout.annotations.push(
      { ...words, text: title, x: panel.x[0], xanchor: "left", yshift: 16, font: { size: 11.5, color: text } },
      { ...end, text: Dom.number(low), x: from, xanchor: "right" },
      { ...end, text: Dom.number(high), x: to, xanchor: "left" },
    );
  }

  return { thirdOf, coloursOf, addBar };
})();
