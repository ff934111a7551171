(function () {
  "use strict";
  const opening = document.getElementById("overview");
  const lead = document.getElementById("lead");

  function panelOf(title) {
    return [...opening.children].find((panel) => panel.dataset.panel === title);
  }

  // A chart that was there before stays in the document, with the stretch that its reader has zoomed to.
  function keepCharts(before, after) {
    const old = new Map([...before.querySelectorAll(".plot")].map((plot) => [plot.getAttribute("aria-label"), plot]));
    for (const plot of after.querySelectorAll(".plot")) {
      const kept = old.get(plot.getAttribute("aria-label"));
      if (!kept) continue;
      kept.style.height = plot.style.height;
      plot.replaceWith(kept);
    }
  }

  function show(message) {
    for (const [title, html] of Object.entries(message.panels)) {
      const holder = document.createElement("template");
      holder.innerHTML = html;  // the server escapes all text, and the page's policy runs no script of it
      const panel = holder.content.firstElementChild;
      const before = panelOf(title);
      if (before) {
        const open = [...before.querySelectorAll("details")].map((details) => details.open);
        [...panel.querySelectorAll("details")].forEach((details, i) => { details.open = Boolean(open[i]); });
        keepCharts(before, panel);
        before.replaceWith(panel);
      } else {
        opening.append(panel);
      }
      panel.querySelectorAll(".plot").forEach((plot) => plot.dispatchEvent(new Event("redraw", {bubbles: true})));
    }
    for (const panel of [...opening.children]) if (!message.order.includes(panel.dataset.panel)) panel.remove();
    message.order.forEach((title, i) => {
      const panel = panelOf(title);
      if (panel && opening.children[i] !== panel) opening.insertBefore(panel, opening.children[i] || null);
    });
    say(message.lead, false);
  }

  function say(text, away) {
    lead.textContent = text;
    lead.className = away ? "lead state away" : "lead state";
  }

  const source = new EventSource(document.body.dataset.live);
  source.onmessage = (event) => show(JSON.parse(event.data));
  source.onerror = () => say("The connection is gone; what you see is the last that came. It is tried again.", true);
})();
