// Injected into a page by the tests: measures its layout once it is drawn, and tells the page around it.
(function () {
  "use strict";
  const TOLERANCE_PX = 1;

  function box(element) {
    const r = element.getBoundingClientRect();
    return { left: r.left + scrollX, top: r.top + scrollY, right: r.right + scrollX, bottom: r.bottom + scrollY };
  }

  function overlap(a, b) {
    return Math.min(a.right, b.right) - Math.max(a.left, b.left) > TOLERANCE_PX
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > TOLERANCE_PX;
  }

  function inside(a, b) {
    return a.left >= b.left - TOLERANCE_PX && a.right <= b.right + TOLERANCE_PX
      && a.top >= b.top - TOLERANCE_PX && a.bottom <= b.bottom + TOLERANCE_PX;
  }

  // Labels of a chart that lie over one another, as "a over b", or stand out of it, as "a cut".
  function collisions(plot) {
    const labels = [...plot.querySelectorAll(".up span, .across span, .phase, .name, .legend li, svg text")]
      .map((text) => ({
        text: text.textContent, box: box(text), shown: getComputedStyle(text).visibility === "visible",
      }))
      .filter((label) => label.shown && label.text.trim() && label.box.right > label.box.left);
    const found = labels.filter((label) => !inside(label.box, box(plot.parentElement))).map((label) => `${label.text} cut`);
    labels.forEach((a, i) => labels.slice(i + 1).forEach((b) => {
      if (overlap(a.box, b.box)) found.push(`${a.text} over ${b.text}`);
    }));
    return found;
  }

  addEventListener("load", () => {
    parent.postMessage({
      scheme: name, width: innerWidth, height: innerHeight,
      dark: matchMedia("(prefers-color-scheme: dark)").matches,
      paper: getComputedStyle(document.body).backgroundColor,
      scroll_width: document.documentElement.scrollWidth,
      contents: box(document.querySelector("nav")),
      panels: Object.fromEntries([...document.querySelectorAll(".panel")]
        .map((panel) => [panel.querySelector("h2").textContent, box(panel)])),
      num_charts: document.querySelectorAll(".drawing svg").length ? document.querySelectorAll(".drawing").length : 0,
      collisions: [...document.querySelectorAll(".drawing")].flatMap((plot) => collisions(plot)
        .map((found) => `${plot.nextElementSibling.textContent} ${found}`)),
    }, "*");
  });
})();
