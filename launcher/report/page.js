"use strict";
// Draws the figures in the colours of the page, and makes filters, sorting and the live page work. No network but its own server's.
(() => {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const NAMES = ["first", "second", "third", "fourth", "fifth", "good", "bad", "muted", "ink"];
  let chosen = null;

  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const colours = (value) => {
    if (Array.isArray(value)) return value.map(colours);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, k === "color" && NAMES.includes(v) ? colour(v) : k === "color" && Array.isArray(v) && typeof v[0] === "string" ? v.map(colour) : k === "x" || k === "y" || k === "text" || k === "name" ? v : colours(v)]));
    return value;
  };
  const axis = (given) => ({ gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("muted"), automargin: true, exponentformat: "e", ...given });

  const draw = () => {
    const source = document.getElementById("figures");
    for (const figure of source ? JSON.parse(source.textContent) : []) {
      const at = document.getElementById("plot-" + figure.id);
      if (!at) continue;
      const layout = colours(figure.layout);
      const whole = { height: 290, margin: { l: 56, r: 14, t: 12, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("ink"), size: 12, family: "system-ui, DejaVu Sans, sans-serif" }, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, hovermode: "closest", ...layout };
      if (figure.data.length > 6) whole.height += 20 * Math.ceil((130 * figure.data.length) / at.clientWidth); // rows of the legend
      whole.xaxis = axis(layout.xaxis);
      whole.yaxis = axis(layout.yaxis);
      Plotly.react(at, colours(figure.data), whole, { responsive: true, displaylogo: false, displayModeBar: false });
    }
    hideTraces();
  };

  const theme = () => {
    root.dataset.theme = chosen || (dark.matches ? "dark" : "light");
    draw();
  };

  const filter = (input) => {
    const wanted = input.value.trim().toLowerCase(), name = input.dataset.filter;
    const rows = [...document.querySelectorAll(`[data-row="${name}"]`)];
    let shown = 0;
    for (const row of rows) { row.hidden = wanted !== "" && !row.textContent.toLowerCase().includes(wanted); shown += !row.hidden; }
    const count = document.querySelector(`[data-count="${name}"]`);
    if (count) count.textContent = wanted ? `${shown} of ${rows.length}` : "";
    hideTraces();
  };

  const hideTraces = () => {
    const boxes = [...document.querySelectorAll("[data-trace]")];
    const shown = new Set(boxes.filter((box) => box.checked && !box.closest("tr").hidden).map((box) => box.dataset.trace));
    for (const id of boxes.length ? ["curves", "parallel"] : []) {
      const plot = document.getElementById("plot-" + id);
      if (plot && plot.data) Plotly.restyle(plot, { visible: plot.data.map((trace) => shown.has(trace.meta)) });
    }
  };

  const sort = (head, wanted) => {
    const column = [...head.parentNode.children].indexOf(head), body = head.closest("table").tBodies[0];
    const way = wanted || (head.getAttribute("aria-sort") === "ascending" ? -1 : 1);
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
    const key = (row) => row.children[column].dataset.value || row.children[column].textContent.trim();
    const number = (text) => (text !== "" && !Number.isNaN(Number(text)) ? Number(text) : null);
    const before = (a, b) => { const [x, y] = [key(a), key(b)], [p, q] = [number(x), number(y)]; return way * (p !== null && q !== null ? p - q : x.localeCompare(y)); };
    for (const row of [...body.rows].sort(before)) body.append(row);
  };

  document.addEventListener("input", (event) => { if (event.target.matches("[data-filter]")) filter(event.target); if (event.target.matches("[data-trace]")) hideTraces(); });
  document.addEventListener("click", (event) => { const head = event.target.closest(".sortable thead th"); if (head) sort(head); });
  document.addEventListener("keydown", (event) => { if ((event.key === "Enter" || event.key === " ") && event.target.matches(".sortable thead th")) { event.preventDefault(); sort(event.target); } });
  document.getElementById("theme").addEventListener("click", () => { chosen = root.dataset.theme === "dark" ? "light" : "dark"; theme(); });
  dark.addEventListener("change", theme);
  let before = null;
  window.addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; draw(); });
  window.addEventListener("afterprint", () => { if (before) { root.dataset.theme = before; draw(); } });
  theme();

  // What the reader has set on a page whose inside is about to be replaced: filters, order, open tables.
  const all = (selector) => [...document.querySelectorAll(selector)];
  const remembered = () => {
    const filters = all("[data-filter]").map((input) => input.value), open = all("details").map((one) => one.open);
    const orders = all(".sortable thead th").map((head) => head.getAttribute("aria-sort"));
    return () => {
      all("details").forEach((one, i) => { one.open = open[i] || false; });
      all(".sortable thead th").forEach((head, i) => { if (orders[i]) sort(head, orders[i] === "ascending" ? 1 : -1); });
      all("[data-filter]").forEach((input, i) => { input.value = filters[i] || ""; filter(input); });
    };
  };

  // The live page asks its own server for what is inside <main>, and takes it only when it has changed.
  const live = document.body.dataset.live;
  if (live) {
    let mark = null;
    const look = async () => {
      try {
        const answer = await fetch(live, { headers: mark ? { "If-None-Match": mark } : {}, cache: "no-store" });
        if (answer.status === 200) {
          const changed = mark !== null;
          mark = answer.headers.get("ETag");
          const text = await answer.text();
          if (changed) {
            const again = remembered();
            document.getElementById("main").innerHTML = text;
            draw();
            again();
          }
        }
        document.body.dataset.connected = "yes";
      } catch { document.body.dataset.connected = "no"; }
      setTimeout(look, 2000);
    };
    look();
  }
})();
