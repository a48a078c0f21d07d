// Draws each picture when it comes near the window, again when the colour scheme changes, and sorts tables on a click.
(() => {
  "use strict";
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const scheme = matchMedia("(prefers-color-scheme: dark)");

  function specOf(panel) {
    const text = JSON.stringify(page.specs[Number(panel.dataset.spec)]);
    if (!scheme.matches) return JSON.parse(text);
    return JSON.parse(text.replace(/#[0-9A-F]{6}/g, (color) => page.dark[color] ?? color));
  }

  function draw(panel) {
    panel.dataset.drawn = "yes";
    vegaEmbed(panel, specOf(panel), {
      renderer: "svg",
      actions: false,
      config: scheme.matches ? page.config.dark : page.config.light,
      tooltip: { theme: scheme.matches ? "dark" : "light" },
    }).catch((error) => {
      panel.textContent = `This picture could not be drawn: ${error.message}`;
    });
  }

  const panels = [...document.querySelectorAll(".panel")];
  const watcher = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting && !entry.target.dataset.drawn)
      .forEach((entry) => draw(entry.target)),
    { rootMargin: "800px" },
  );
  panels.forEach((panel) => watcher.observe(panel));
  scheme.addEventListener("change", () => panels.filter((panel) => panel.dataset.drawn).forEach(draw));
  addEventListener("beforeprint", () => panels.filter((panel) => !panel.dataset.drawn).forEach(draw));

  function sort(header) {
    const table = header.closest("table");
    const index = header.cellIndex;
    const down = header.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyOf = (row) => row.cells[index].dataset.order ?? row.cells[index].textContent;
    const numeric = [...table.tBodies[0].rows].every((row) => row.cells[index].dataset.order !== undefined);
    const rows = [...table.tBodies[0].rows].sort((a, b) =>
      numeric ? Number(keyOf(a)) - Number(keyOf(b)) : keyOf(a).localeCompare(keyOf(b)));
    (down ? rows.reverse() : rows).forEach((row) => table.tBodies[0].append(row));
  }

  document.querySelectorAll("th").forEach((header) => {
    header.tabIndex = 0;
    header.addEventListener("click", () => sort(header));
    header.addEventListener("keydown", (event) => event.key === "Enter" && sort(header));
  });
})();
