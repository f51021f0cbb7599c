"use strict";

// Small words for making elements. All text is text: nothing that a run says becomes markup.
const Dom = (() => {
  // el("td", {class: "number", onclick: f}, "text", child, ...); null children are left out.
  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name in made && name !== "list" && typeof value !== "string") made[name] = value;
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return made;
  }

  // Put children in the place of those that are there; what had the focus has it again, by its data-key.
  function fill(parent, ...children) {
    const key = parent.contains(document.activeElement) && document.activeElement.dataset.key;
    parent.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    if (key) [...parent.querySelectorAll("[data-key]")].find((child) => child.dataset.key === key)?.focus();
  }

  // The same, but for a list of options that somebody may have open: it stays.
  function refill(parent, ...children) {
    if (!parent.contains(document.activeElement) || document.activeElement.tagName !== "SELECT")
      fill(parent, ...children);
  }

  const MINUS = "\u2212";

  // A number to read: three decimals where that says enough, with a proper minus sign.
  function number(value, digits = 3) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : `${MINUS}∞`;
    const size = Math.abs(value);
    const shown =
      size >= 1e5 || (size > 0 && size < 0.5 * 10 ** -digits)
        ? value.toExponential(1)
        : value.toFixed(size >= 100 ? Math.min(digits, 1) : digits);
    return shown.replace("-", MINUS);
  }

  // A number of any size, by the digits that count.
  function significant(value) {
    return Number.isFinite(value) ? String(Number(value.toPrecision(3))).replace(/-/g, MINUS) : number(value);
  }

  function signed(value, digits = 3) {
    return (value > 0 ? "+" : "") + number(value, digits);
  }

  function count(value, one, many = `${one}s`) {
    return `${value.toLocaleString("en")} ${value === 1 ? one : many}`;
  }

  function seconds(value) {
    if (Number.isNaN(value)) return "–";
    if (value >= 5400) return `${(value / 3600).toFixed(1)} h`;
    if (value >= 90) return `${(value / 60).toFixed(1)} min`;
    return value > 0 && value < 0.1 ? `${(1000 * value).toPrecision(2)} ms` : `${value.toPrecision(2)} s`;
  }

  // Buttons of which one is pressed: [[value, text], ...].
  function choice(label, options, current, choose) {
    const buttons = options.map(([value, text]) =>
      el(
        "button",
        {
          type: "button",
          "aria-pressed": String(value === current),
          "data-key": `${label} ${value}`,
          onclick: () => choose(value),
        },
        text,
      ),
    );
    return el(
      "div",
      { class: "choice", role: "group", "aria-label": label },
      el("span", { class: "legend" }, label),
      buttons,
    );
  }

  function select(label, options, current, choose) {
    const made = el("select", { onchange: (event) => choose(event.target.value) });
    for (const [value, text] of options) made.append(el("option", { value, selected: value === current }, text));
    return el("label", { class: "select" }, el("span", { class: "legend" }, label), made);
  }

  function card(title, ...children) {
    return el("section", { class: "card" }, title ? el("h2", {}, title) : null, ...children);
  }

  // A command to type, with a button that copies it.
  function command(text) {
    const words = text.split(" ").map((word, i) => [i ? " " : "", el("span", {}, word)]); // lines break between words
    const code = el("code", { tabindex: "0" }, words);
    const button = el(
      "button",
      {
        type: "button",
        class: "copy",
        onclick: async () => {
          try {
            await navigator.clipboard.writeText(text);
          } catch {
            // not allowed, as in some browsers for files: by way of a selection
            const range = document.createRange();
            range.selectNodeContents(code);
            getSelection().removeAllRanges();
            getSelection().addRange(range);
            document.execCommand("copy");
          }
          button.textContent = "Copied";
          setTimeout(() => {
            button.textContent = "Copy";
          }, 1500);
        },
      },
      "Copy",
    );
    return el("div", { class: "command" }, code, button);
  }

  const empty = (text) => el("p", { class: "empty" }, text);

  return { el, fill, refill, number, significant, signed, count, seconds, choice, select, card, command, empty };
})();
