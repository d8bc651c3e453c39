"use strict";
// Says what is under the pointer or has the focus: a mark's data-tip, the value of a heat map's cell, or the values of all
// lines of a plot at the pointer's place.
(() => {
  const tip = document.getElementById("tip");
  const levels = new WeakMap();

  // The browser's own tooltip would come on top of ours.
  for (const title of document.querySelectorAll("[data-tip] > title")) title.remove();

  function show(text, x, y) {
    tip.textContent = text;
    tip.hidden = !text;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = Math.max(4, y + box.height + 24 > innerHeight ? y - box.height - 10 : y + 16) + "px";
  }

  function cell(map, event) {
    if (!levels.has(map)) levels.set(map, Uint8Array.from(atob(map.dataset.levels), (c) => c.charCodeAt(0)));
    const values = levels.get(map);
    const rows = map.dataset.rows.split(" ");
    const points = Number(map.dataset.points);
    const box = map.getBoundingClientRect();
    const column = Math.min(points - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * points)));
    const row = Math.min(rows.length - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows.length)));
    const level = values[row * points + column];
    const value = level ? Math.round(((level - 1) / 254) * Number(map.dataset.most)).toLocaleString() + map.dataset.unit : "not there";
    return `${rows[row]}, ${Math.round(column * Number(map.dataset.resolution))} s: ${value}`;
  }

  function atLines(plot, event) {
    const found = [];
    let place = "";
    for (const line of plot.querySelectorAll("[data-tips]")) {
      if (!levels.has(line)) levels.set(line, line.dataset.tips.split(";").map((tip) => tip.split("|")));
      const tips = levels.get(line);
      const box = plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * plot.viewBox.baseVal.width;
      let nearest = 0;
      for (let i = 0; i < tips.length; i++) {
        if (Math.abs(line.points[i].x - x) < Math.abs(line.points[nearest].x - x)) nearest = i;
      }
      if (Math.abs(line.points[nearest].x - x) > 12) continue;
      place = tips[nearest][0];
      found.push(`${line.dataset.name}: ${tips[nearest][1]}`);
    }
    return found.length ? [place, ...found].join("\n") : "";
  }

  document.addEventListener("pointermove", (event) => {
    const map = event.target.closest(".heat");
    const mark = event.target.closest("[data-tip]");
    if (map) show(cell(map, event), event.clientX, event.clientY);
    else if (mark) show(mark.dataset.tip, event.clientX, event.clientY);
    else {
      const plot = event.target.closest("svg.plot");
      show(plot ? atLines(plot, event) : "", event.clientX, event.clientY);
    }
  });
  document.addEventListener("focusin", (event) => {
    const mark = event.target.closest("[data-tip]");
    if (!mark) return;
    const box = mark.getBoundingClientRect();
    show(mark.dataset.tip, box.right, box.bottom);
  });
  document.addEventListener("focusout", () => show("", 0, 0));
})();
