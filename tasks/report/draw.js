// Draws the figures of the page, in the colours of the light or the dark page, and again when that changes.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures"), dark = read("dark");
  const preferred = matchMedia("(prefers-color-scheme: dark)");

  const recoloured = (value) => {
    if (typeof value === "string") return dark[value] ?? value;
    if (Array.isArray(value)) return value.map(recoloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, recoloured(part)]));
    return value;
  };

  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    const [ink, rule, paper] = ["--ink", "--rule", "--paper"].map((name) => style.getPropertyValue(name).trim());
    for (const place of document.querySelectorAll("[data-figure]")) {
      // a copy: plotly writes into what it is given
      const { data, layout } = structuredClone(preferred.matches ? recoloured(figures[place.dataset.figure]) : figures[place.dataset.figure]);
      layout.font = { color: ink, family: style.getPropertyValue("font-family"), size: 12 };
      layout.hoverlabel = { bgcolor: paper, bordercolor: rule, font: { color: ink }, align: "left" };
      for (const axis of ["xaxis", "yaxis"]) Object.assign(layout[axis], { gridcolor: rule, linecolor: rule, tickcolor: rule });
      Plotly.react(place, data, layout, { displayModeBar: false, responsive: true }).then(() => { place.dataset.drawn = preferred.matches ? "dark" : "light"; });
    }
  };

  draw();
  preferred.addEventListener("change", draw);
})();
