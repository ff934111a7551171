(function () {
  "use strict";
  const NAME_GAP_PX = 4;
  const PRINT_WIDTH_PX = 670;  // A4 less the margins of the print style
  const root = document.documentElement;
  const touch = matchMedia("(pointer: coarse)").matches;  // on a phone a finger scrolls the page, it does not zoom charts

  const contents = document.querySelector("nav .contents");
  const wide = matchMedia("(min-width: 66rem)");  // as in the style: there the contents stand beside the text

  function themed(value, style) {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => themed(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
    }
    return value;
  }

  // Names of phases stand beside one another above a chart; those that find no room there are in its table.
  function thin(plot) {
    const frame = plot.getBoundingClientRect();
    let taken = frame.left;
    for (const name of plot.querySelectorAll(".annotation")) {
      const place = name.getBoundingClientRect();
      const fits = place.left >= taken && place.right <= frame.right;
      name.style.visibility = fits ? "visible" : "hidden";
      if (fits) taken = place.right + NAME_GAP_PX;
    }
  }

  function drawOne(plot, printing) {
    const figure = themed(JSON.parse(plot.nextElementSibling.textContent), getComputedStyle(root));
    figure.layout.font.family = getComputedStyle(document.body).fontFamily;
    figure.layout.dragmode = touch ? false : "zoom";
    figure.layout.uirevision = "same";  // what the reader has zoomed to stays when a page renews its charts
    if (printing) {
      figure.layout.width = plot.closest(".grid, .pictures") ? PRINT_WIDTH_PX / 2 - 12 : PRINT_WIDTH_PX;
    }
    const drawn = plot.classList.contains("js-plotly-plot");
    Plotly.react(plot, figure.data, figure.layout, {
      responsive: true, displayModeBar: false,  // dragging zooms and a double click resets without buttons
    });
    if (!drawn) plot.on("plotly_afterplot", () => thin(plot));
    thin(plot);
  }

  function draw(printing) {
    for (const plot of document.querySelectorAll(".plot")) drawOne(plot, printing);
  }

  const fold = () => { if (contents) contents.open = wide.matches; };  // on a phone a list would hide what the page tells
  wide.addEventListener("change", fold);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(false));
  addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    for (const details of document.querySelectorAll("details")) details.open = true;
    draw(true);
  });
  addEventListener("afterprint", () => { delete root.dataset.theme; fold(); draw(false); });
  document.addEventListener("redraw", (event) => drawOne(event.target, false));
  fold();
  draw(false);
})();
