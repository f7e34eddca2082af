"use strict";
(() => {
  const table = document.getElementById("layers");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  const key = (row, column, numeric) => {
    const text = row.cells[column].textContent;
    if (!numeric) return text;
    const value = parseFloat(text);
    return Number.isNaN(value) ? null : value;
  };
  heads.forEach((head, column) => {
    const numeric = head.classList.contains("n");
    head.querySelector("button").addEventListener("click", () => {
      const first = numeric ? "descending" : "ascending";
      const second = numeric ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      rows
        .map((row) => [key(row, column, numeric), row])
        .sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
        })
        .forEach(([, row]) => body.append(row));
    });
  });

  const input = document.getElementById("find");
  const told = document.getElementById("found");
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    let count = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      count += !row.hidden;
    }
    told.textContent = `${count} of ${rows.length} layers`;
  });
})();
