"use strict";
// Everything here adds to a page that is complete without it.
(() => {
  const root = document.documentElement;
  const all = (query, within = document) => [...within.querySelectorAll(query)];

  // Light and dark: the system decides until the reader does.
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  const stored = (value) => {
    try {
      if (value) localStorage.setItem("perta-theme", value);
      return localStorage.getItem("perta-theme");
    } catch { return null; } // pages from disk may have no storage
  };
  const chosen = stored();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  button.hidden = false;
  name();
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    name();
  });
  system.addEventListener("change", name);

  // Sortable tables: a button in every heading; empty cells stay last.
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    if (text === "" || text === "–") return null;
    const number = Number(text.replace("−", "-"));
    return Number.isNaN(number) ? text.toLowerCase() : number;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  for (const table of all("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const control = document.createElement("button");
      control.type = "button";
      control.append(...head.childNodes);
      head.append(control);
      control.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [value(row, column), row]);
        rows.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          return down ? compare(b, a) : compare(a, b);
        });
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  // Toggles: one button per method shows and hides it in every figure and table.
  for (const group of all(".toggles")) {
    group.hidden = false;
    for (const control of all("button", group)) {
      control.addEventListener("click", () => {
        const on = control.getAttribute("aria-pressed") !== "true";
        control.setAttribute("aria-pressed", String(on));
        for (const item of document.getElementsByClassName(control.dataset.toggle)) {
          item.classList.toggle("off", !on);
        }
      });
    }
  }

  // Tooltips for pointer and keyboard. A figure is one stop; arrow keys move within it.
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (mark) => {
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const shape = mark.querySelector(".shape") ?? mark;
    const box = shape.getBoundingClientRect();
    const left = scrollX + box.left + box.width / 2 - tip.offsetWidth / 2;
    const limit = scrollX + root.clientWidth - tip.offsetWidth - 8;
    const above = box.top - tip.offsetHeight - 10;
    tip.style.left = `${Math.max(scrollX + 8, Math.min(left, limit))}px`;
    tip.style.top = `${scrollY + (above > 4 ? above : box.bottom + 10)}px`;
  };
  const visible = (mark) => !mark.classList.contains("off");
  const next = (marks, mark, key, grid) => {
    if (grid && key !== "Home" && key !== "End") {
      const row = Number(mark.dataset.row) + (key === "ArrowDown") - (key === "ArrowUp");
      const col = Number(mark.dataset.col) + (key === "ArrowRight") - (key === "ArrowLeft");
      return marks.find((m) => Number(m.dataset.row) === row && Number(m.dataset.col) === col);
    }
    const shown = marks.filter(visible);
    if (key === "Home") return shown[0];
    if (key === "End") return shown.at(-1);
    const step = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
    return shown[(shown.indexOf(mark) + step + shown.length) % shown.length];
  };
  for (const figure of all("svg.figure")) {
    const marks = all("[data-tip]", figure);
    if (marks.length) {
      figure.setAttribute("role", "group");
      figure.setAttribute("aria-description", "Arrow keys move from mark to mark.");
    }
    marks.forEach((mark, i) => {
      mark.querySelector("title")?.remove();
      mark.setAttribute("role", "img");
      mark.setAttribute("aria-label", mark.dataset.tip.replaceAll("\n", ", "));
      mark.setAttribute("tabindex", i === 0 ? "0" : "-1");
      mark.addEventListener("pointerenter", () => show(mark));
      mark.addEventListener("pointerleave", hide);
      mark.addEventListener("focus", () => show(mark));
      mark.addEventListener("blur", hide);
      mark.addEventListener("keydown", (event) => {
        if (event.key === "Escape") return hide();
        if (!["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
        event.preventDefault();
        const other = next(marks, mark, event.key, "grid" in figure.dataset);
        if (!other) return;
        mark.setAttribute("tabindex", "-1");
        other.setAttribute("tabindex", "0");
        other.focus();
      });
    });
  }

  // On paper nothing can be unfolded, except the long record.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = all("details:not([open])").filter((item) => !item.closest("#record"));
    folded.forEach((item) => { item.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((item) => { item.open = false; }));
})();
