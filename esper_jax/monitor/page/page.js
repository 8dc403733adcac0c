"use strict";
(() => {
  const tip = document.getElementById("tip");
  let shown = null;

  function hide() {
    tip.hidden = true;
    shown?.removeAttribute("aria-describedby");
    shown = null;
  }

  function show(mark) {
    if (mark === shown) return;
    hide();
    shown = mark;
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    place(mark);
  }

  function place(mark) {
    const at = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const wide = document.documentElement.clientWidth;
    const left = Math.min(Math.max(8, at.left), Math.max(8, wide - own.width - 8));
    const below = at.bottom + 4 + own.height <= window.innerHeight || at.top < own.height + 4;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(below ? at.bottom + 4 : at.top - own.height - 4) + window.scrollY}px`;
  }

  // The mark of a row that lies nearest to another's middle.
  function nearest(row, mark) {
    const middle = (m) => { const r = m.getBoundingClientRect(); return (r.left + r.right) / 2; };
    const here = middle(mark);
    return [...row.querySelectorAll(".tip")]
      .sort((a, b) => Math.abs(middle(a) - here) - Math.abs(middle(b) - here))[0];
  }

  for (const group of document.querySelectorAll(".tips")) {
    const marks = [...group.querySelectorAll(".tip")];
    if (!marks.length) continue;
    for (const mark of marks) {
      mark.setAttribute("aria-label", mark.title);
      mark.removeAttribute("title");
      mark.tabIndex = -1;
    }
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", `${group.dataset.tips}; move with the arrow keys`);
    let current = marks[0];
    current.tabIndex = 0;
    const rows = [...group.querySelectorAll(".row")].filter((r) => r.querySelector(".tip"));

    group.addEventListener("focusin", (event) => {
      const mark = event.target.closest(".tip");
      if (!mark) return;
      current.tabIndex = -1;
      current = mark;
      current.tabIndex = 0;
      show(mark);
    });
    group.addEventListener("focusout", hide);
    group.addEventListener("pointerover", (event) => {
      const mark = event.target.closest(".tip");
      if (mark) show(mark);
    });
    group.addEventListener("pointerout", (event) => {
      const to = event.relatedTarget;
      if (to !== tip && !to?.closest?.(".tip")) hide();
    });
    group.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const row = rows.indexOf(current.closest(".row"));
      const inside = [...rows[row].querySelectorAll(".tip")], place = inside.indexOf(current);
      const next = {
        ArrowRight: () => inside[place + 1],
        ArrowLeft: () => inside[place - 1],
        Home: () => inside[0],
        End: () => inside[inside.length - 1],
        ArrowDown: () => rows[row + 1] && nearest(rows[row + 1], current),
        ArrowUp: () => rows[row - 1] && nearest(rows[row - 1], current),
      }[event.key];
      if (!next) return;
      event.preventDefault();
      next()?.focus();
    });
  }
  tip.addEventListener("pointerleave", hide);
  document.addEventListener("scroll", () => { if (shown) place(shown); }, true);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
})();
