"use strict";

// What all pictures share: colours of the theme, how Plotly draws, faint points of any number, heat maps.
const Plots = (() => {
  const LETTER = 6.5; // pixels of one in small print, about
  const MAX_DRAWN = 1500; // points of a kind that are drawn one by one; more become an image

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    return Object.fromEntries(
      ["text", "muted", "faint", "line", "front", "chosen", "versus", "panel", "low", "middle", "high", "mark"].map(
        (name) => [name, read(name)],
      ),
    );
  }

  // Plotly reads a few tags in text: a name that holds one is shown as it is.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");

  function axis(title, more = {}) {
    const { line, muted } = colours();
    return {
      title: { text: plain(title), standoff: 8, font: { size: 12 } },
      gridcolor: line,
      zeroline: false,
      linecolor: line,
      tickcolor: line,
      ticks: "outside",
      ticklen: 3,
      tickfont: { size: 11, color: muted },
      automargin: true,
      exponentformat: "none",
      ...more,
    };
  }

  function titled(objective) {
    return objective.name + (objective.sign < 0 ? " (lower is better)" : "");
  }

  // Draw, or redraw without losing zoom, and what is hidden by the legend; the description is what a screen reader says.
  // onClick is told the subject that was clicked at; onLegend, that something was hidden or shown.
  async function draw(place, description, traces, layout, { onClick = null, onLegend = null } = {}) {
    const { text, panel, line } = colours();
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hovermode: "closest",
      dragmode: "zoom",
      uirevision: "kept",
      font: { family: "system-ui, sans-serif", size: 12, color: text },
      margin: { l: 50, r: 14, t: 14, b: 44 },
      hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: text, size: 12 }, align: "left" },
      legend: { font: { size: 11.5 }, itemsizing: "constant" },
    };
    const config = {
      displaylogo: false,
      responsive: true,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"],
      plotlyServerURL: "", // nothing leaves the page
    };
    place.style.minHeight = `${layout.height}px`; // while it is drawn anew
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", description);
    traces.forEach((trace, i) => {
      // by which Plotly knows what was hidden; it has to be a name in CSS
      trace.uid = `${trace.name ?? i} ${trace.xaxis}`.replace(/\W/g, (mark) => `-${mark.charCodeAt(0)}`);
    });
    await Plotly.react(place, traces, { ...base, ...layout }, config);
    for (const event of ["plotly_click", "plotly_restyle"]) place.removeAllListeners(event);
    if (onLegend) place.on("plotly_restyle", onLegend);
    if (onClick)
      place.on("plotly_click", (event) => {
        const subject = event.points.map((point) => point.customdata).find((found) => typeof found === "string");
        if (subject) onClick(subject);
      });
  }

  // A range that holds all numbers, with a margin (a share of it) on both sides.
  function rangeOf(numbers, share = 0.05) {
    let low = Infinity;
    let high = -Infinity;
    for (const number of numbers) {
      if (!Number.isFinite(number)) continue;
      if (number < low) low = number;
      if (number > high) high = number;
    }
    if (low > high) return [0, 1];
    const margin = high > low ? (high - low) * share : (Math.abs(high) || 1) * 0.05;
    return [low - margin, high + margin];
  }

  // Thousands of points as one image in the coordinates of two axes; crowds of them, each {values: [xs, ys], marker}.
  function pointsImage(crowds, [[left, right], [bottom, top]], axes) {
    const width = 700;
    const height = 450;
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    for (const { values, marker } of crowds) {
      const [xs, ys] = values;
      const { color } = marker; // one for all, or a list
      context.fillStyle = color;
      context.globalAlpha = marker.opacity ?? 1;
      for (let i = 0; i < xs.length; i++) {
        if (Array.isArray(color)) context.fillStyle = color[i];
        const x = ((xs[i] - left) / (right - left)) * width;
        const y = height - ((ys[i] - bottom) / (top - bottom)) * height;
        context.fillRect(x - marker.size / 2, y - marker.size / 2, marker.size, marker.size);
      }
    }
    return {
      source: canvas.toDataURL("image/png"),
      xref: axes[0],
      yref: axes[1],
      x: left,
      y: top,
      sizex: right - left,
      sizey: top - bottom,
      sizing: "stretch",
      layer: "below",
      xanchor: "left",
      yanchor: "top",
    };
  }

  // A heat map of {row, column, number}: rows down, columns across. diverging: about 0, else from 0 up.
  function heatMap(place, description, cells, { diverging = true, digits = 2 } = {}) {
    const { low, middle, high } = colours();
    const rows = [...new Set(cells.map((cell) => cell.row))];
    const columns = [...new Set(cells.map((cell) => cell.column))];
    const matrix = rows.map(() => columns.map(() => null));
    for (const { row, column, number } of cells) matrix[rows.indexOf(row)][columns.indexOf(column)] = number;
    const limit = Math.max(1e-9, ...cells.map((cell) => Math.abs(cell.number)));
    const longest = (texts) => LETTER * Math.max(...texts.map((text) => text.length));
    const width = (place.clientWidth - longest(rows) - 80) / columns.length; // of a cell, beside names and bar
    const isRoomy = width > longest(cells.map((cell) => cell.number.toFixed(digits))) + 4;
    const isSlanted = width < longest(columns) + 4;
    const trace = {
      type: "heatmap",
      z: matrix,
      x: columns.map(plain),
      y: rows.map(plain),
      xgap: 1,
      ygap: 1,
      zmin: diverging ? -limit : 0,
      zmax: limit,
      colorscale: diverging
        ? [
            [0, low],
            [0.5, middle],
            [1, high],
          ]
        : [
            [0, middle],
            [1, high],
          ],
      texttemplate: isRoomy && cells.length <= 240 ? `%{z:.${digits}f}` : undefined,
      textfont: { size: 11 },
      hovertemplate: "%{y}, %{x}: %{z:.4f}<extra></extra>",
      showscale: true,
      colorbar: { thickness: 8, outlinewidth: 0, tickfont: { size: 10.5 }, len: 1, nticks: 5 },
    };
    return draw(place, description, [trace], {
      height: 62 + 30 * rows.length + (isSlanted ? 0.7 * longest(columns) : 0),
      margin: { l: 10, r: 10, t: 8, b: 10 },
      xaxis: axis("", {
        showgrid: false,
        ticks: "",
        type: "category",
        tickangle: isSlanted ? -45 : 0,
        nticks: columns.length > 24 ? 24 : undefined,
      }),
      yaxis: axis("", { showgrid: false, ticks: "", type: "category", autorange: "reversed" }),
    });
  }

  return { MAX_DRAWN, colours, plain, axis, titled, draw, rangeOf, pointsImage, heatMap };
})();
