// Draws the page's figures from the JSON in #airtune-data. Nothing is fetched.
(function () {
  "use strict";
  const page = JSON.parse(document.getElementById("airtune-data").textContent);
  const settings = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  const state = { entry: 0, round: null };
  const drawn = new Map();

  // "var(--name)" anywhere in a figure becomes the value of that CSS variable in the reader's theme.
  function resolved(value, css) {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? css.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => resolved(item, css));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, css)]));
    }
    return value;
  }

  function merged(base, over) {
    const result = { ...base };
    for (const [key, value] of Object.entries(over)) {
      const both = value !== null && typeof value === "object" && !Array.isArray(value) && typeof result[key] === "object";
      result[key] = both ? merged(result[key], value) : value;
    }
    return result;
  }

  const axisStyle = {
    gridcolor: "var(--grid)", linecolor: "var(--hair)", zeroline: false, automargin: true, ticks: "",
    title: { font: { size: 12, color: "var(--muted)" }, standoff: 10 }, tickfont: { size: 12, color: "var(--ink-2)" },
  };

  function styled(figure) {
    const base = {
      height: figure.height, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif", size: 12, color: "var(--ink-2)" },
      margin: { l: 56, r: 14, t: 30, b: 46 }, hovermode: "closest", separators: ".,",
      hoverlabel: { bgcolor: "var(--hover)", bordercolor: "var(--hair)", font: { color: "var(--ink)", size: 13 } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: "var(--ink-2)", size: 12 } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "var(--muted)", activecolor: "var(--ink)" },
      bargap: 0.25, xaxis: {}, yaxis: {},
    };
    const layout = merged(base, figure.layout);
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) layout[key] = merged(axisStyle, layout[key]);
    }
    return layout;
  }

  function draw(slot, figure) {
    const card = slot.closest("figure");
    card.hidden = !figure;
    if (!figure) { Plotly.purge(slot); drawn.delete(slot); return; }
    if (slot.dataset.figure !== "round") {
      card.querySelector("h3").textContent = figure.title;
      card.querySelector("figcaption p").textContent = figure.caption;
    }
    const css = getComputedStyle(document.documentElement);
    drawn.set(slot, figure);
    slot.style.height = figure.height + "px";
    Plotly.react(slot, resolved(figure.data, css), resolved(styled(figure), css), settings)
      .then(() => { slot.dataset.drawn = "yes"; });
  }

  // ---- units, as on the page: decimal prefixes, three significant digits

  function unit(values, name) {
    const largest = Math.max(0, ...values.filter((v) => v !== null).map(Math.abs));
    const steps = [["G", 1e9], ["M", 1e6], ["k", 1e3], ["", 1]];
    const [prefix, factor] = steps.find(([, size]) => largest >= size) || (name === "" || !largest ? ["", 1] : ["m", 1e-3]);
    return { name: prefix + name, factor };
  }

  function digits(value) {
    if (value === null || value === undefined) return "-";
    const decimals = value === 0 ? 0 : Math.min(9, Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value)))));
    return value.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  }

  // ---- the round view: one row a client; its timeline, its share of the band, its slice, its energy

  const stages = [
    ["download_s", "Download", "var(--stage-download)"], ["compute_s", "Compute", "var(--stage-compute)"],
    ["upload_s", "Upload", "var(--stage-upload)"], ["wait_s", "Wait", "var(--stage-wait)"],
  ];
  const columns = [
    ["bandwidth_hz", "Bandwidth", "Hz", "var(--series-1)"], ["components", "Rank components", "", "var(--series-3)"],
    ["depth", "Layers trained", "", "var(--series-8)"], ["energy_j", "Energy", "J", "var(--series-6)"],
    ["probability", "Probability", "", "var(--series-5)"], ["keep_ratio", "Share kept", "", "var(--series-4)"],
  ];

  function heading(text, xref) {
    return { text, xref: xref + " domain", yref: "paper", x: 0, y: 1, xanchor: "left", yanchor: "bottom", yshift: 6,
      showarrow: false, font: { color: "var(--ink)", size: 13 } };
  }

  function upright(x, dash) {
    return { type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: "var(--ink)", width: 1, dash } };
  }

  function roundFigure(round) {
    const seen = new Map(); // a client may return work of an earlier round beside that of this one
    const labels = round.client.map((client, i) => {
      const times = (seen.get(client) || 0) + 1;
      seen.set(client, times);
      return `${client}` + (times > 1 ? ` (${times})` : "") + (round.device[i] ? `  ${round.device[i]}` : "");
    });
    const shown = columns.filter(([key]) => round[key]);
    const width = Math.min(0.115, 0.5 / Math.max(1, shown.length)), gap = 0.022, main = 1 - shown.length * (width + gap);
    const data = [], notes = [heading("Timeline, s", "x")];
    const layout = {
      barmode: "overlay", margin: { l: 90, t: 34, b: 34, r: 10 }, shapes: [upright(round.duration_s, "dot")],
      xaxis: { domain: [0, main], rangemode: "tozero" },
      yaxis: { type: "category", categoryorder: "array", categoryarray: labels, showgrid: false },
      showlegend: false,
    };
    if (round.predicted_s !== null) layout.shapes.push(upright(round.predicted_s, "dash"));
    const start = round.start_s.slice();
    for (const [key, name, color] of stages) {
      const seconds = round[key];
      data.push({ type: "bar", orientation: "h", name, y: labels, x: seconds, base: start.slice(), marker: { color },
        hovertemplate: `client %{y}<br>${name.toLowerCase()} %{customdata:.4g} s<extra></extra>`, customdata: seconds });
      seconds.forEach((value, i) => { start[i] += value; });
    }
    shown.forEach(([key, name, symbol, color], index) => {
      const tag = String(index + 2), left = main + gap + index * (width + gap);
      const scale = symbol ? unit(round[key], symbol) : { name: "", factor: 1 };
      data.push({ type: "bar", orientation: "h", y: labels, x: round[key].map((v) => (v === null ? null : v / scale.factor)),
        xaxis: "x" + tag, marker: { color }, showlegend: false,
        hovertemplate: `client %{y}<br>${name.toLowerCase()} %{x:.4g} ${scale.name}<extra></extra>` });
      layout["xaxis" + tag] = { domain: [left, left + width], rangemode: "tozero", nticks: 4, anchor: "y" };
      const title = (round.titles || {})[key] || name;
      notes.push(heading(title + (scale.name ? ", " + scale.name : ""), "x" + tag));
    });
    const lost = new Map(round.dropped.map((item) => [item.client, item.reason]));
    round.client.forEach((client, i) => {
      if (lost.has(client)) notes.push({ text: lost.get(client).replace(/[<&]/g, " "), xref: "x", yref: "y", x: start[i], y: labels[i], xanchor: "right",
        showarrow: false, font: { color: "var(--ink)", size: 11 }, bgcolor: "var(--surface)", borderpad: 1, opacity: 0.9 });
    });
    layout.annotations = notes;
    return { data, layout, height: 84 + 24 * labels.length };
  }

  function facts(round, view) {
    const parts = [];
    if (round.round !== null) parts.push(`Round ${round.round} took ${digits(round.duration_s)} s (dotted line) and ended at ${digits(round.time_s)} s.`);
    else parts.push(`The round ends at ${digits(round.duration_s)} s (dotted line).`);
    if (round.predicted_s !== null) parts.push(`The planner had predicted ${digits(round.predicted_s)} s (dashed line).`);
    if (round.arrived !== null) {
      const lost = round.dropped.slice(0, 4).map((item) => `client ${item.client}: ${item.reason}`).join("; ");
      const more = round.lost > 4 ? `; and ${round.lost - 4} more` : "";
      parts.push(`${round.arrived} of ${round.cohort} clients arrived` + (round.lost ? ` (${lost}${more}).` : "."));
    }
    if (round.client.length < round.of_clients) parts.push(`The ${round.client.length} slowest of ${round.of_clients.toLocaleString("en-US")} clients are shown.`);
    if (view.rounds.length < view.of_rounds) parts.push(`${view.rounds.length} of ${view.of_rounds} rounds can be selected.`);
    return parts.join(" ");
  }

  function showRound() {
    const card = document.getElementById("round-view");
    if (!card) return;
    const view = page.entries[state.entry].view;
    const slot = card.querySelector(".plot");
    if (!view || !view.rounds.length) { draw(slot, null); return; }
    const last = view.rounds.length - 1;
    const wanted = state.round === null ? Math.floor(last / 2) : state.round;
    state.round = Math.max(0, Math.min(last, wanted));
    const round = view.rounds[state.round];
    const picker = card.querySelector(".picker");
    picker.hidden = last === 0;
    picker.querySelector("input").max = String(last);
    picker.querySelector("input").value = String(state.round);
    picker.querySelector("output").textContent = `round ${round.round} of ${view.rounds[last].round}`;
    card.querySelector(".facts").textContent = facts(round, view);
    const present = stages.filter(([key]) => round[key].some((seconds) => seconds > 0));
    card.querySelector(".key").replaceChildren(...present.map(([, name, color]) => {
      const item = document.createElement("li"), swatch = document.createElement("i");
      swatch.style.background = color;
      item.append(swatch, name);
      return item;
    }));
    draw(slot, roundFigure(round));
  }

  function showEntry() {
    const entry = page.entries[state.entry];
    for (const slot of document.querySelectorAll('figure[data-scope="entry"] .plot')) {
      draw(slot, entry.figures[slot.dataset.figure]);
    }
    for (const block of document.querySelectorAll("[data-entry]")) block.hidden = Number(block.dataset.entry) !== state.entry;
    showRound();
  }

  function start() {
    for (const slot of document.querySelectorAll('figure[data-scope="page"] .plot')) {
      draw(slot, page.figures[slot.dataset.figure]);
    }
    const chooser = document.getElementById("chooser");
    if (chooser) chooser.addEventListener("change", () => { state.entry = Number(chooser.value); showEntry(); });
    const picker = document.querySelector("#round-view .picker");
    if (picker) {
      picker.querySelector("input").addEventListener("input", (event) => { state.round = Number(event.target.value); showRound(); });
      for (const button of picker.querySelectorAll("button")) {
        button.addEventListener("click", () => { state.round += Number(button.dataset.step); showRound(); });
      }
    }
    if (page.entries.length) showEntry();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      for (const [slot, figure] of [...drawn]) draw(slot, figure);
    });
  }

  start();
})();
